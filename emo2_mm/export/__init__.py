"""Export for deployment. Needs ``onnx``, ``onnxruntime`` (extra ``onnx``) and the library of the config."""
