"""What Python tells of functions, classes and modules: their code, their names, and where they come from."""
