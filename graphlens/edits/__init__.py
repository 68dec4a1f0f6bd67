"""An edit as data: what to change at which hook point, and the gate that it becomes in a run."""
