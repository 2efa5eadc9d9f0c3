function heat()
% HEAT  Reference solutions of a discrete heat optimal control problem.
%
%   heat    solve every case below and write heat_<case>.mat and heat.csv
%           into the current folder
%
% On the rectangle (0,a) x (0,b) and (0,T), find the control z for which the
% solution u of
%
%     u_t - kappa Lap u + r u = z,    u(.,0) = 0
%
% stays close to d, alpha being the price of control.  On the boundary u = 0
% or du/dn = 0.  With boundary control, z is not a source but the flux
% kappa du/dn through the side y = 0, where u is free.  Discretized by Q1
% elements in space and the theta scheme in time (step tau = T/N), the
% problem is to minimize
%
%     J = sum_{i=0..N} w_i/2 |u_i - d_i|_M^2
%       + alpha/2 sum_{k=1..N} tau |z_k|_Q^2
%
% with trapezoidal weights w = tau (1/2, 1, ..., 1, 1/2), subject to
%
%     F_k = M (u_k - u_{k-1}) + tau S [th u_k + (1-th) u_{k-1}]
%                             - tau B z_k  =  0,       k = 1..N,
%
% where S = kappa A + r M.  M, A are the mass and stiffness matrices on the
% free nodes, Q the mass matrix of the control, over the rectangle or over
% the side y = 0, on all nodes there, and B its free rows.
%
% Nothing here is clever.  Matrices of the rectangle are Kronecker products
% of those of its sides, x being the faster index.  The problem is quadratic:
% its KKT conditions, of L = J + sum_k lam_k' F_k, are one sparse linear
% system over all of space-time, which backslash solves.

  store(cases());
end


function list = cases()
% Each row: name of the case, then what differs from the defaults.
  list = {
    'euler',       {}
    'trapezoid',   {'theta', 0.5,  'nx', 9,   'ny', 5, 'nt', 9}
    'cheap',       {'alpha', 1e-6, 'nt', 8}
    'cheap_trapezoid', {'alpha', 1e-5, 'theta', 0.5, 'T', 0.5}
    'conductive',  {'kappa', 1,    'nx', 7,   'ny', 6, 'nt', 7}
    'insulated',   {'boundary', 'neumann', 'target', 'one', 'reaction', 1, ...
                    'kappa', 0.1,  'theta', 0.5, 'length', 0.6, ...
                    'height', 0.2, 'alpha', 1e-4}
    'flux',        {'control', 'boundary', 'alpha', 1e-2}
    'flux_insulated', {'control', 'boundary', 'boundary', 'neumann', ...
                    'theta', 0.75, 'kappa', 0.2}
  };
end


function p = parameters(varargin)
% The default problem, with name-value pairs replacing some of it.
  p = struct('nx', 8, 'ny', 4, 'nt', 6, 'T', 1, 'kappa', 0.05, ...
             'alpha', 1e-3, 'theta', 1, 'reaction', 0, 'length', 3, ...
             'height', 1, 'control', 'distributed', ...
             'boundary', 'dirichlet', 'target', 'bump');
  for k = 1:2:nargin
    p.(varargin{k}) = varargin{k+1};
  end
end


function o = discretize(p)
% Space-time operators.  Vectors over space-time stack the time levels, so
% kron(T, X) applies the matrix X in space and the matrix T in time.

  % Space, on all nodes.
  [Mx, Ax, x] = side(p.nx, p.length);
  [My, Ay, y] = side(p.ny, p.height);
  M = kron(My, Mx);
  A = kron(My, Ax) + kron(Ay, Mx);
  [X, Y] = ndgrid(x, y);
  X = X(:);  Y = Y(:);
  bottom = Y == 0;
  others = X == 0 | X == p.length | Y == p.height;

  % The control and its nodes: everywhere, or on the side y = 0.
  flux = strcmp(p.control, 'boundary');
  if flux
    corner = sparse(1, 1, 1, p.ny+1, p.ny+1);
    Q = kron(corner, Mx);
    controlled = bottom;
  else
    Q = M;
    controlled = true(size(X));
  end

  % The free nodes: those at which u = 0 is not imposed.
  if strcmp(p.boundary, 'neumann')
    free = true(size(X));
  elseif flux
    free = ~others;
  else
    free = ~(others | bottom);
  end
  B = Q(free, controlled);
  Q = Q(controlled, controlled);
  M = M(free, free);
  S = p.kappa*A(free, free) + p.reaction*M;
  X = X(free);  Y = Y(free);

  % Time.  Rows are the steps 1..N, columns the levels 1..N; level 0 is zero.
  N = p.nt;
  tau = p.T/N;
  I = speye(N);
  P = spdiags(ones(N, 1), -1, N, N);         % level k -> level k-1
  Theta = p.theta*I + (1 - p.theta)*P;
  w = tau*[1/2; ones(N-1, 1); 1/2];          % trapezoidal, levels 0..N

  % What to stay close to, a column per level.
  t = (0:N)*tau;
  if strcmp(p.target, 'one')
    d = ones(nnz(free), N+1);
  else
    d = sin(pi*t).*exp(-8*((X - 0.75 - 1.5*t).^2 + (Y - 0.5).^2));
  end

  o.m = nnz(free);
  o.Fu = kron(I - P, M) + tau*kron(Theta, S);
  o.Fz = -tau*kron(I, B);
  o.Juu = kron(spdiags(w(2:end), 0, N, N), M);
  o.Jzz = p.alpha*tau*kron(I, Q);
  o.d = reshape(d(:, 2:end), [], 1);
  o.J0 = w(1)/2*d(:, 1)'*M*d(:, 1);          % what level 0 adds to J
end


function [M, A, x] = side(n, length)
% Mass and stiffness matrix and nodes of n linear elements on (0, length).
  h = length/n;
  e = ones(n+1, 1);
  M = spdiags(h/6*[e 4*e e], -1:1, n+1, n+1);
  A = spdiags(1/h*[-e 2*e -e], -1:1, n+1, n+1);
  M([1 end]) = h/3;                          % the end hats are halves
  A([1 end]) = 1/h;
  x = length*(0:n)/n;
end


function [u, z, lam, o, residual] = solve(p)
% The KKT system, and once more for its residual.
  o = discretize(p);
  n = numel(o.d);
  m = size(o.Jzz, 1);
  K = [o.Juu          sparse(n, m)  o.Fu'
       sparse(m, n)   o.Jzz         o.Fz'
       o.Fu           o.Fz          sparse(n, n)];
  b = [o.Juu*o.d; zeros(m + n, 1)];
  s = K\b;
  s = s + K\(b - K*s);
  residual = norm(b - K*s, inf);
  assert(residual < 1e-14, 'the KKT residual is %g', residual);
  u = s(1:n);  z = s(n+1:n+m);  lam = s(n+m+1:end);
end


function store(list)
  csv = fopen('heat.csv', 'w');
  fprintf(csv, ['case,control,boundary,target,nx,ny,nt,length,height,T,' ...
                'kappa,reaction,alpha,theta,objective,kkt_residual\n']);
  for k = 1:size(list, 1)
    name = list{k, 1};
    p = parameters(list{k, 2}{:});
    [u, z, lam, o, residual] = solve(p);

    s = p;                                   % time levels become rows
    s.u = reshape(u, o.m, []).';
    s.z = reshape(z, [], p.nt).';
    s.lam = reshape(lam, o.m, []).';
    e = u - o.d;
    s.objective = o.J0 + e'*o.Juu*e/2 + z'*o.Jzz*z/2;
    s.kkt_residual = residual;
    save(['heat_' name '.mat'], '-struct', 's', '-v7');

    fprintf(csv, '%s,%s,%s,%s,%d,%d,%d', name, p.control, p.boundary, ...
            p.target, p.nx, p.ny, p.nt);
    fprintf(csv, ',%.15g', p.length, p.height, p.T, p.kappa, p.reaction, ...
            p.alpha, p.theta);
    fprintf(csv, ',%.17g,%.2g\n', s.objective, residual);
    fprintf('%-15s J = %.14f   residual %.1e\n', name, s.objective, residual);
  end
  fclose(csv);
end
