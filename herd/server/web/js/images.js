// Pictures that the user attaches: read, made smaller when they are large, kept as data in the message.

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const LARGEST_FILE = 30 * 2 ** 20;
const LONGEST_SIDE = 1568;
export const MOST_IMAGES = 8;

/** {url, name, width, height} of a file. Throws Error saying why not. */
export async function readImage(file) {
  if (!TYPES.includes(file.type)) throw new Error(`${file.name || "This file"} is ${file.type || "of an unknown type"}: PNG, JPEG, WebP and GIF can be attached.`);
  if (file.size > LARGEST_FILE) throw new Error(`${file.name} is larger than 30 MB.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "The picture"} cannot be read.`);
  }
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const name = file.name || "pasted picture";
  if (scale === 1 && file.size < 2 ** 20) return { url: await dataUrl(file), name, width, height };
  // redrawn: smaller, and without what cameras write into files (places, names)
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
  const type = file.type === "image/jpeg" ? "image/jpeg" : "image/png";
  return { url: await dataUrl(await canvas.convertToBlob({ type, quality: 0.9 })), name, width, height };
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** The image files of a paste or a drop. */
export function imagesIn(transfer) {
  return Array.from(transfer?.files ?? []).filter((file) => file.type.startsWith("image/"));
}
