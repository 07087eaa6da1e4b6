"""What an override names, and a rule that is in force there."""
