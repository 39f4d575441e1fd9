// A picture on the stage: waiting, its preview, the result, and its clock.

import { word } from "/page/words.js";

const seconds = (ms) => (ms / 1000).toFixed(2);

export class Card {
  constructor(parent, { title, width, height }) {
    this.element = document.createElement("figure");
    this.element.className = "card";
    this.element.dataset.state = "waiting";
    const frame = document.createElement("div");
    frame.className = "frame";
    frame.style.aspectRatio = `${width} / ${height}`;
    this.preview = frame.appendChild(new Image());
    this.result = frame.appendChild(new Image());
    this.preview.alt = this.result.alt = "";
    this.stage = frame.appendChild(document.createElement("span"));
    this.stage.className = "stage-name";
    this.stage.textContent = word("waiting");
    const caption = document.createElement("figcaption");
    caption.appendChild(document.createElement("b")).textContent = title;
    this.clock = caption.appendChild(document.createElement("span"));
    this.clock.className = "clock";
    this.element.append(frame, caption);
    parent.append(this.element);
  }

  start() {
    this.started = performance.now();
    this.previewed = null;
    this.timer = setInterval(() => this.tick(), 50);
  }

  tick() {
    const total = seconds((this.ended ?? performance.now()) - this.started);
    const preview = this.previewed && seconds(this.previewed - this.started);
    this.clock.textContent = word("clock", { preview, total });
  }

  // One event of the stream.
  show(event, prompt) {
    const final = event.type.endsWith("completed");
    const image = final ? this.result : this.preview;
    image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
    image.alt = prompt;
    image.classList.add("shown");
    if (final) this.end("done");
    else {
      this.previewed = performance.now();
      this.element.dataset.state = "preview";
      this.stage.textContent = word("preview");
    }
  }

  end(state) {
    if (this.element.dataset.state === "done") return;
    this.ended = performance.now();
    clearInterval(this.timer);
    if (this.started) this.tick();
    this.element.dataset.state = state;
    this.stage.textContent = word(state);
    this.stage.hidden = state === "done";
  }
}
