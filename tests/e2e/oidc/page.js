// What a page of one's own does: authorization code with PKCE (RFC 7636), then the relay's client.
import { RelayClient } from "./relay-client.js";

const { issuer, gateway, resource } = await (await fetch("settings.json")).json();
const redirectUri = location.origin + location.pathname;
const state = document.getElementById("state");

function base64url(bytes) {
  return btoa(String.fromCharCode(...new Uint8Array(bytes)))
    .replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

async function signIn() {
  const verifier = base64url(crypto.getRandomValues(new Uint8Array(32)));
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(verifier));
  const nonce = base64url(crypto.getRandomValues(new Uint8Array(16)));
  sessionStorage.setItem("verifier", verifier);
  sessionStorage.setItem("state", nonce);
  location.assign(`${issuer}/auth?` + new URLSearchParams({
    client_id: "chat",
    response_type: "code",
    redirect_uri: redirectUri,
    scope: "openid chat",
    resource,
    state: nonce,
    code_challenge: base64url(digest),
    code_challenge_method: "S256",
  }));
}

async function exchange(code) {
  const answer = await fetch(`${issuer}/token`, {
    method: "POST",
    body: new URLSearchParams({
      grant_type: "authorization_code",
      client_id: "chat",
      code,
      redirect_uri: redirectUri,
      code_verifier: sessionStorage.getItem("verifier"),
      resource,
    }),
  });
  if (!answer.ok) throw new Error(await answer.text());
  return (await answer.json()).access_token;
}

async function chat(token) {
  window.events = [];
  const client = new RelayClient({ url: gateway, token });
  client.addEventListener("event", ({ detail }) => {
    window.events.push(detail);
    if (detail.type === "agent_completed") {
      document.getElementById("answer").textContent = detail.data.result;
    }
  });
  client.addEventListener("established", ({ detail }) => {
    state.textContent = `connected as ${detail.user_id}`;
  });
  window.client = client;
  client.connect();
}

document.getElementById("sign-in").addEventListener("click", signIn);
const query = new URLSearchParams(location.search);
if (query.has("code")) {
  if (query.get("state") !== sessionStorage.getItem("state")) throw new Error("not our sign-in");
  history.replaceState(null, "", location.pathname);
  await chat(await exchange(query.get("code")));
}
