curl localhost:5001/jobs -X POST -d '{"msg": {"arg1": 6, "arg2": 3}}' -H 'Content-Type: application/json'      # an id
curl localhost:5001/jobs/ID/result            # 18, with a listener that multiplies msg['arg1'] and msg['arg2']
curl localhost:5001/jobs/ID/result.mp3 --output -
curl localhost:5001/jobs -X POST -H 'Content-Type: application/json' -d '{"msg": "message", "callback": "http://localhost:5001/some_callback"}'
curl localhost:5001/jobs -X POST -H 'Content-Type: application/json' -d '{"msg": "message", "functions": ["my_func"]}'
