/* Loaded before the first paint, so that a chosen theme never flashes its opposite. */
(() => {
  const chosen = localStorage.getItem("relay.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
