"""Quality: which blocks selection keeps, and what approximation costs in answers."""
