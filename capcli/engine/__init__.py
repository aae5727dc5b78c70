"""Engine folders: engine.json, the checks of a folder, and the packages that run engines."""
