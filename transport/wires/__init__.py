"""How bytes reach another process."""
