"""Engine folders: engine.json, its checks, and the packages that run engines."""
