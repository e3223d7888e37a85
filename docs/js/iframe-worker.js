// Browsers refuse to start a worker from a page that was opened from disk, and the search runs in one. Here it runs in a hidden frame instead.
// Only pages opened from disk do this; nothing is fetched from a network.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html><title>search</title><body></body>";
      this.ready = new Promise((resolve) => {
        frame.addEventListener("load", async () => {
          const inside = frame.contentWindow;
          const load = (src) => new Promise((done, failed) => {
            const script = inside.document.createElement("script");
            Object.assign(script, { src, onload: done, onerror: failed });
            inside.document.body.append(script);
          });
          inside.importScripts = (...urls) => urls.reduce((before, src) => before.then(() => load(src)), Promise.resolve());
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          await load(url);
          resolve(inside);
        }, { once: true });
      });
      document.body.append(frame);
    }
    postMessage(data) {
      this.ready.then((inside) => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
    }
    terminate() {}
  };
}
