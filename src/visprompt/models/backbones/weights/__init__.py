"""Read published weights of backbones."""
