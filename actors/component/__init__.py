"""What an actor is: its ports, its kind, its sessions."""
