"""The other ways in: edited graphs, connected ones, NumPy, surrogates."""
