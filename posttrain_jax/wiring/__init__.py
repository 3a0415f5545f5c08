"""Where a ConfigDict ends: mesh, model, data, optimizer, task."""
