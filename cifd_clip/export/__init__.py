"""A student leaves the project, checked against what was trained."""

FORMATS = ("open_clip", "onnx", "torch_export", "transformers")
