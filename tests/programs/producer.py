import time
from mlqueue.queue import MLQ
mlq = MLQ('example_app', 'localhost', 6379, 0)
job_id = mlq.post({'my_data': 1234})
result = None
while not result:
    time.sleep(0.1)
    job = mlq.get_job(job_id)
    result = job['result']
print(result)
