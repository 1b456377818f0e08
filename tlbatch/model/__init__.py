"""Pixels -> features and scores. Only this package loads Keras, TensorFlow and OpenVINO."""
