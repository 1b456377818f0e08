"""A published table -> a local web application that shows its images and takes corrections. Only this package serves HTTP."""
