// The server's API: models, and one picture as a stream of events.

export class Refused extends Error {
  constructor(status, error, retryAfter) {
    super(error?.message ?? `HTTP ${status}`);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function check(answer) {
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  throw new Refused(answer.status, body.error, answer.headers.get("Retry-After"));
}

export async function ask(path, key) {
  return check(await fetch(path, { headers: headers(key) }));
}

export async function listModels(key) {
  return (await (await ask("/v1/models", key)).json()).data;
}

// Calls onEvent with each event of the stream; throws Refused, or what fetch throws.
export async function streamPicture(body, { key, signal, onEvent }) {
  const answer = await check(
    await fetch("/v1/images/generations", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers(key) },
      body: JSON.stringify({ ...body, stream: true, partial_images: 1 }),
      signal,
    }),
  );
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const data = text.slice(0, end).split("\n").find((line) => line.startsWith("data: "));
      text = text.slice(end + 2);
      if (!data) continue;
      const event = JSON.parse(data.slice(6));
      if (event.error) throw new Refused(500, event.error);
      onEvent(event);
    }
  }
}
