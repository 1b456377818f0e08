"""Pixels -> features and scores. Keras, TensorFlow and OpenVINO live here only."""
