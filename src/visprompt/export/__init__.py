"""Write a tuned classifier for other programs: ONNX, `torch.export`, plain timm, the Hugging Face hub."""
