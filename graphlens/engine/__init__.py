"""Which graph and which session serve a run: plan, graph, session."""
