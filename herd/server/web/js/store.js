// Conversations in this browser's own database. Nothing of them is kept on the server.

const NAME = "herd";
const STORE = "conversations";

export class Store {
  /** Opens the database. Where the browser has none (private windows of some), conversations last as long as the page. */
  static async open() {
    const store = new Store();
    try {
      store.database = await new Promise((resolve, reject) => {
        const opening = indexedDB.open(NAME, 1);
        opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id" });
        opening.onsuccess = () => resolve(opening.result);
        opening.onerror = () => reject(opening.error);
        opening.onblocked = () => reject(new Error("another tab holds an older version"));
      });
    } catch (error) {
      store.problem = String(error?.message ?? error);
    }
    return store;
  }

  constructor() {
    this.database = null;
    this.problem = null;
    this.memory = new Map();
  }

  /** All conversations, the latest first. */
  async all() {
    const found = this.database ? await this.#do("readonly", (store) => store.getAll()) : [...this.memory.values()];
    return found.sort((a, b) => b.updated - a.updated);
  }

  async get(id) {
    return this.database ? this.#do("readonly", (store) => store.get(id)) : this.memory.get(id);
  }

  async put(conversation) {
    if (!this.database) this.memory.set(conversation.id, structuredClone(conversation));
    else await this.#do("readwrite", (store) => store.put(conversation));
  }

  async remove(id) {
    if (!this.database) this.memory.delete(id);
    else await this.#do("readwrite", (store) => store.delete(id));
  }

  #do(mode, work) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(STORE, mode);
      const request = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = transaction.onerror = () => reject(transaction.error ?? request.error);
    });
  }
}
