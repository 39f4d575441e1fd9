// The text that a PNG made here carries: prompt, seed, steps, model, size, weights.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const MOST = 64 * 2 ** 20;

export async function readFacts(file) {
  if (file.size > MOST) return null;
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (!SIGNATURE.every((value, index) => bytes[index] === value)) return null;
  const view = new DataView(bytes.buffer);
  const utf8 = new TextDecoder();
  const facts = {};
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = utf8.decode(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (kind === "iTXt") {
      // keyword 0 compressed method language 0 translated 0 text
      const key = data.indexOf(0);
      const tongue = data.indexOf(0, key + 3);
      const translated = data.indexOf(0, tongue + 1);
      if (key > 0 && data[key + 1] === 0 && translated > 0) {
        facts[utf8.decode(data.subarray(0, key))] = utf8.decode(data.subarray(translated + 1));
      }
    }
    if (kind === "IEND") break;
    at += 12 + length;
  }
  facts.prompt ??= facts.Description; // pictures of earlier versions say prompt
  return facts.prompt !== undefined && "seed" in facts ? facts : null;
}
