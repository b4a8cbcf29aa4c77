"""The MNIST experiment of Hinton, Vinyals and Dean (2015), section 3: one teacher, many students, many temperatures."""
