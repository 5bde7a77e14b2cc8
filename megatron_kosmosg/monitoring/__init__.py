"""What watches a run: heartbeat, spans, trace, stragglers, signals, failures, node health."""
