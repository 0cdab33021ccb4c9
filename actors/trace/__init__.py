"""Record what actors do: traces, spans and recordings."""
