"""Many runs for one question: sweeps, path patching, attribution, circuits, head detection, harvests of a corpus."""
