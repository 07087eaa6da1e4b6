"""The engine. One call flows: decorator -> signature -> call -> function -> torch -> rule -> contract -> gradients."""
