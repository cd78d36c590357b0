// Jobs over the HTTP interface: submitting one, and watching one until it has ended.

const JSON_TYPE = "application/json";

/** What the server answered, or an error with its own words. */
export async function ask(url, options = {}) {
  const response = await fetch(url, { ...options, headers: { Accept: JSON_TYPE, ...options.headers } });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw new Error(answer.detail || `The server answered ${response.status}.`);
  }
  return answer;
}

/** Submits a job; the same key whenever the request is made again, so that it creates one job. */
export function submit(url, body, headers = {}) {
  const key = crypto.randomUUID ? crypto.randomUUID() : `${Date.now()}-${Math.random()}`;
  return ask(url, { method: "POST", body, headers: { "Idempotency-Key": key, ...headers } });
}

/** Whether a job moves no further. */
export function hasEnded(record) {
  return ["succeeded", "dead", "cancelled"].includes(record.state);
}

/**
 * Calls `show(record)` whenever the job has changed, until it has ended. By server-sent events; where there are none
 * (too many, a server of threads, a proxy that holds them back) by asking now and then. Calls `tell(how)` with which.
 * Returns a function that ends it.
 */
export function watch(url, show, tell = () => {}) {
  let over = false, source = null, timer = null, last = {};

  const stop = () => {
    over = true;
    clearTimeout(timer);
    source.close();
  };

  const take = (record) => {
    if (over) return;
    last = record;
    show(record);
    if (hasEnded(record)) stop();
  };

  const look = async () => {
    try {
      take(await ask(url));
    } catch (error) {
      if (!over) tell(`not reached: ${error.message}`);
    }
  };

  const poll = () => {
    source.close();
    tell("by asking every second");
    const next = async () => {
      await look();
      if (!over) timer = setTimeout(next, 1000);
    };
    next();
  };

  source = new EventSource(`${url}/events`);
  source.addEventListener("snapshot", (event) => {
    clearTimeout(timer);
    tell("live");
    take(JSON.parse(event.data));
  });
  for (const name of ["state", "progress"]) {
    source.addEventListener(name, (event) => {
      const told = { ...last, ...JSON.parse(event.data) };
      // What it ended with is on its record.
      if (hasEnded(told)) look();
      else take(told);
    });
  }
  source.addEventListener("error", () => {
    // It connects again by itself, unless it was refused.
    if (!over && source.readyState === EventSource.CLOSED) poll();
  });
  // Nothing at all: something on the way holds it back.
  timer = setTimeout(() => over || poll(), 5000);
  return stop;
}
