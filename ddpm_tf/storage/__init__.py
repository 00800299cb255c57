"""What survives a crash: checkpoints, workdirs, and the fingerprint that says whether a run is still the same."""
