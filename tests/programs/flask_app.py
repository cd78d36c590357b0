import os
from flask import Flask, redirect, request
from mlqueue.queue import MLQ

app = Flask(__name__)
mlq = MLQ('word_app')
PORT = int(os.environ.get('PORT', 5000))
results = {}    # what the callbacks have told, by job


@app.get('/')
def form():
    return '<form method="post" action="/process"><textarea name="text"></textarea><button>Count</button></form>'


@app.post('/process')
def process():
    job_id = mlq.post({'text': request.form['text']}, callback=f'http://localhost:{PORT}/done')
    results[job_id] = 'processing'
    return redirect(f'/status/{job_id}')


@app.get('/done')
def done():
    if request.args['success'] == '1':
        results[request.args['job_id']] = 'done: ' + request.args['short_result']
    else:
        results[request.args['job_id']] = 'failed'
    return 'ok'


@app.get('/status/<job_id>')
def status(job_id):
    return f'<meta http-equiv="refresh" content="1"><p>{results[job_id]}</p>'


if __name__ == '__main__':
    app.run(port=PORT)
