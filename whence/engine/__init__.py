"""The loop that all work on gradients goes through: rows of a point stream to sinks, which receive their gradients."""
