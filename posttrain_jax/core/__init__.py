"""What every room stands on: types, errors, trees, masks, meshes, optimizers."""
