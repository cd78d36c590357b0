from mlqueue.queue import MLQ

mlq = MLQ('word_app')


def count(msg, utils):
    words = msg['text'].split()
    utils['update_progress'](50)
    return f'{len(words)} words', words    # the short result and the full one


mlq.create_listener(count)
