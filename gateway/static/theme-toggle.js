/** Day and night: the system's choice until the user makes one. `theme.js` applies it at load. */

export function listenToTheme(toggle) {
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const system = () => (prefersDark.matches ? "dark" : "light");
  const isDark = () => (document.documentElement.dataset.theme ?? system()) === "dark";
  const label = () =>
    toggle.setAttribute("aria-label", isDark() ? "Use the light theme" : "Use the dark theme");
  toggle.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("relay.theme", theme);
    label();
  });
  prefersDark.addEventListener("change", label);
  label();
}
