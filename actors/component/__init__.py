"""Define what an actor is: its ports, its kind, its sessions."""
