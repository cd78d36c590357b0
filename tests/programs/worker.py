import asyncio
from mlqueue.queue import MLQ
mlq = MLQ('example_app', 'localhost', 6379, 0)
def simple_multiply(params_dict, *args):
    return params_dict['my_data'] * 2
async def main():
    mlq.create_listener(simple_multiply)
asyncio.run(main())      # returns; the process stays
