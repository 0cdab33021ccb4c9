"""What an edge promises: order, credit, acknowledgement."""
