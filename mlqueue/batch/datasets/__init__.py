"""Data sets that are downloaded once, verified, converted into HDF5 and read lazily.

::

    from mlqueue.batch.datasets import mnist
    digits = mnist.MNIST(n_val=10000)
    digits.train_X, digits.train_y, digits.val_X, digits.val_y, digits.test_X, digits.test_y

Modules: :mod:`mnist`, :mod:`fashion_mnist`, :mod:`cifar10`, :mod:`cifar100`, :mod:`svhn`, :mod:`stl`, :mod:`usps`;
:mod:`dataset` for data sets of your own. ``mlqueue datasets`` lists, fetches and removes them. They need the extra
packages of ``pip install 'mlqueue[datasets]'``.
"""
