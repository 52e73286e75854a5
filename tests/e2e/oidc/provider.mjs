// A real OpenID Connect provider: authorization code with PKCE, access tokens as RS256 JWTs.
//
// Standard input is its configuration, as JSON: port, jwks (private keys; the first one signs),
// resources (audiences that tokens can be asked for), redirect_uri, ttl_s. Prints one line for each
// time that its key set is read.
import { readFileSync } from "node:fs";
import Provider from "oidc-provider";

const configuration = JSON.parse(readFileSync(0, "utf8"));
const issuer = `http://127.0.0.1:${configuration.port}`;

const provider = new Provider(issuer, {
  clients: [{
    client_id: "chat",
    token_endpoint_auth_method: "none",
    redirect_uris: [configuration.redirect_uri],
    grant_types: ["authorization_code"],
    response_types: ["code"],
  }],
  jwks: { keys: configuration.jwks },
  cookies: { keys: ["signs the cookies of the tests"] },
  clientBasedCORS: () => true,
  features: {
    // Pages for login, which takes any name and password, and for consent.
    devInteractions: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (_context, resource) => {
        if (!configuration.resources.includes(resource)) throw new Error(`unknown: ${resource}`);
        return {
          scope: "chat",
          audience: resource,
          accessTokenFormat: "jwt",
          accessTokenTTL: configuration.ttl_s,
          jwt: { sign: { alg: "RS256" } },
        };
      },
    },
  },
});
provider.use(async (context, next) => {
  if (context.path === "/jwks") console.log("KEY SET READ");
  await next();
});
provider.listen(configuration.port, "127.0.0.1", () => console.log("READY"));
