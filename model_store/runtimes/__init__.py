"""Ways to run a frozen backbone: one class an engine, all of them a `Runtime`."""
