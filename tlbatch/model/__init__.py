"""Stage 4: pixels -> features and scores. Nothing outside this folder imports TensorFlow or OpenVINO."""
