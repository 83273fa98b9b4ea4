// Before anything is drawn: the colours that the user chose, so that nothing flashes.
try {
  const chosen = localStorage.getItem("herd.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // no storage: the system's colours
}
