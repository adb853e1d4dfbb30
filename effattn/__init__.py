"""The JAX home of efficient attention: models, kernels, training and scaling studies."""
