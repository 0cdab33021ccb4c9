"""Keep what an edge promises: order, credit and acknowledgement."""
