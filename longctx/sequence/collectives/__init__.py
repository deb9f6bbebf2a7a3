"""The collectives through which all sequence traffic goes. With one rank each is the identity."""
