"""What a forward offers, what a rule asks for, and what it may return."""
