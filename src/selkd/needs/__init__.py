"""What a run needs, counted without running anything: tokens, steps, parameters, memory, bytes on disk."""
