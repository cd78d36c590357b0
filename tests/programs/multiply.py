from mlqueue.queue import MLQ
mlq = MLQ('example_app')
def multiply(msg, *args):
    return msg['arg1'] * msg['arg2']
mlq.create_listener(multiply)
