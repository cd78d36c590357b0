"""Mini-batches: data sources, samplers, pools of workers and data sets, with the names and calls of BatchUp.

::

    from mlqueue.batch import config, data_source, sampling, work_pool
    from mlqueue.batch.datasets import mnist

numpy is the only package this needs; everything else is imported where it is used.
"""
